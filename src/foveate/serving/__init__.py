"""The same recipes behind an HTTP address and over files: vLLM's plug-in, the server's door, batches on Ray."""
