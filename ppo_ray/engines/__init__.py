"""Text generation behind one Protocol: vLLM for use, transformers where vLLM cannot be installed and in tests."""
