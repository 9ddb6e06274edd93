"""The engines that packages run on: one file each, all behind the interface in ``base``."""
