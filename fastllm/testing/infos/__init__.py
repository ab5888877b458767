"""The OpInfos, one file per op stem."""
