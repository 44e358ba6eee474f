"""What serves: the gates, the aliases, the lock."""
