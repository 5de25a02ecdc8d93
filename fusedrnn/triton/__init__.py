"""The Triton backend: any cell as a pair of Triton functions, run by the schedules of this package.

Importing this module does not import Triton: ``ops`` does, and registers the ops.
"""
