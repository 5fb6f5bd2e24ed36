"""The command that reviews a run and its photos: mistakes, suspicious labels, copies."""
