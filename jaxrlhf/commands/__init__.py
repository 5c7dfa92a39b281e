"""The command line `jaxrlhf`: a configuration and a function each, which the scripts in `experiments` call too."""
