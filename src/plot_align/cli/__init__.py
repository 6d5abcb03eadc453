"""The subcommands of ``plot-align``, one module each: ``run(arguments) -> exit code``."""
