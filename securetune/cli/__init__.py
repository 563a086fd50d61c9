"""The command line ``securetune``. Heavy imports happen inside the commands, so that ``--help`` is quick."""
