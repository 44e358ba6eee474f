"""The training processes on a Ray cluster: how many there are, what they are asked, what they tell."""
