"""The package on real runtimes: parity, memory, latency, report. Runs without torch.

``validate.py`` is ``ffmerge validate``. For every runtime (``runtimes/``) and optimization level it
opens each graph once and hands the session to the checks: ``parity.py`` holds the outputs against
PyTorch's (``reference.py`` reads them, ``tolerance.py`` bounds them, ``quality.py`` compares
scores), ``decode.py`` does so with greedy decoding, ``metric.py`` and ``translation.py`` measure
the task. ``locate.py`` names the node that a wrong output comes from, ``footprint.py`` measures
memory and latency in a fresh process. All of it is filled into ``results.py``, which ``report.py``
shows, with numbers as ``words.py`` writes them.
``loaded.py`` is for ``ffmerge audit``: which weights a load multiplies. ``test_package.py`` is for
devices: ``python -m ffmerge.runtime_tests --package FOLDER``.
"""
