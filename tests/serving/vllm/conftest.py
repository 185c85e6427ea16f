"""These tests run in the serving environment (`make test-serving`); without vLLM none is collected."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["*.py"]
