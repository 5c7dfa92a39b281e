"""`python -m jaxrlhf` is the command `jaxrlhf`, of the Python that runs it."""

from jaxrlhf.commands.main import main

if __name__ == "__main__":
    main()
