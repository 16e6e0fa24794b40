"""One training job: its loop, the folder it works in, and whatever can end it. Loads without torch (`job` does not).

job           from settings to summary: what is found wrong, and in which order
trainer       the loop; `assembly` makes its optimizer and merges, `pending` brings a step's numbers to the host
a run's folder    rundir, runlock, opening; restart (what a checkpoint holds of a run)
may end a run     stopping (signals), health (numbers that are not finite), reading (text), rescue (saves first),
                  agreement and together (of all ranks)
is told           messages, diagnosis, evaluation, profiling
"""
