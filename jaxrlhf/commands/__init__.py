"""The command line `jaxrlhf`: one configuration and one `main` per command, also used by the scripts in `experiments`."""
