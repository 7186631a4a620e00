"""The sections of the configuration, one model a JSON section."""
