"""Merge jobs: checkpoint folders in, a checkpoint folder out. Recipe -> plan -> run."""
