"""The package on real runtimes: parity, memory, latency, report. Runs without torch."""
