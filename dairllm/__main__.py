"""`python -m dairllm` is `dairllm`."""

from dairllm.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
