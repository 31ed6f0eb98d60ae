"""Train dynamic facial expression recognition.

Imported before torch, as `import torch` fails for a user id without a name and where no temporary folder is found.
"""

import getpass
import os
import tempfile

__version__ = "0.1.0"


def _fit_for_torch() -> None:
    """Give the process what torch asks for while it is imported, where the machine does not have it.

    A container may run with any user id (docker run -u, OpenShift). Without a home folder ~ stays what it is, a folder
    of that name where the process was started.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # an OSError since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # torch asks for its name alone; who writes there hears of it then
        tempfile.tempdir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"


_fit_for_torch()
