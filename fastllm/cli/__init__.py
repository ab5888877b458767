"""The command line: one thin file per command, loaded when its command runs."""
