"""Generations for other runtimes: ONNX, torch.export, safetensors."""
