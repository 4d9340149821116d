"""The version. Not read from what is installed, since a job may have the package on its path alone."""

VERSION = "0.1.0"
