"""Bodies of the commands, one file each: `run(...)`. Imported only when the command is called."""

__all__: list[str] = []
