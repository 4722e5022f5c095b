"""Trainings without a graph: ``python -m perfusion train`` and ``train-many``.

``options`` says what can be set, once for the command line and for manifests; ``models`` loads a model; ``train``
learns one concept; ``many`` learns those of a manifest, in this process or spread by Ray; ``commands`` turns what comes
of them into exit codes. Like nodes, these modules stand above the hosts: nothing else in ``perfusion`` imports them.
"""
