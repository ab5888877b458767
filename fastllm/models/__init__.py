"""Model files, configurations, names and the decoder. Import the module that you need."""
