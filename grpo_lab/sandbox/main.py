"""Started as a bare interpreter's script; only this small file is compiled anew each time."""

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from harness import main  # type: ignore[import-not-found]

    del sys.path[0]
    main()
