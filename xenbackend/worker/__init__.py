"""The process that serves one vbd: the only place where kernel, blkif and block meet."""
