"""`python -m launch run CONFIG`, and so `torchrun ... -m launch run CONFIG`."""

from launch.cli import main

if __name__ == "__main__":
    main()
