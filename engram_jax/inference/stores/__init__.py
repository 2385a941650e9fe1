"""Rows of tables that are not on the accelerator, behind one call: `store.fetch(row_ids)`.

form        RowStore: what every store does, and what may be asked of it
host        HostRows: tables in host memory, in any row encoding
file        FileRows: tables in a file on disk, read row by row
table_file  the format of that file, and its verification
write       how such a file is written, streaming
"""
