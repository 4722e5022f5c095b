"""Commands that measure. Each prints what it does on stderr and, with ``--json``, one line of figures on stdout."""
