"""``python -m minids ...``"""

from minids.cli import main

if __name__ == "__main__":
    main()
