"""Captions for whole collections: what `pyllava-cli caption` does, in parts that know no command line and no model.

::

    inputs     names -> entries: files, folders, lists, tables, tars          each picture once, in order
    texts      an entry -> its prompt; an answer -> a caption, or a refusal
    ledger     JSON Lines, one row for each picture; the lock; what is done
    plan       entries, ledger and side files -> what is left to do
    asking     entries through a model, a row for each        the same here and in a cluster's workers
    side_files the text beside each picture
    tables     the ledger's rows as CSV and Parquet

**One truth.** The JSON Lines file is the ledger: what it says is done is done, and everything else is made from it. A row is
appended when its picture is finished, in one write; then the text beside the picture is written under another name and renamed.
CSV and Parquet are written as a whole when a run ends. So a process may be killed at any moment: a last line without an end is
cut off at the next start, a side file that is missing is written from its row, and only the pictures under way are computed again.

**Done** is a picture that has a row of status ``ok`` with the same path, the same bytes and the same settings. The bytes are the
same if size and time of the file are, else if their SHA-256 is. The settings are a digest of all that the caption depends on:
prompt, model, template, sampler, precision, how the text is changed. Rows of other settings in the same file are a mistake
more often than a wish: the run is refused, unless it is told to begin anew. Rows of errors, and of pictures that have changed,
are taken out when their pictures are tried again; so a path never has two rows.

**The lock** is one of the system's on the ledger itself (flock), which ends with the process; there is no file to be left behind.

**Side files alone** (no ledger): a picture that has one is done. Two pictures that would share one, ``a.jpg`` and ``a.png``, are
told apart by an extension with ``{ext}`` in it, or the second is refused by name.
"""
