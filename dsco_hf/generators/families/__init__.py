"""The families of denoisers that the package brings, one file each."""
