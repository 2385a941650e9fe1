"""Rows of tables that are not on the accelerator, behind one call: `store.fetch(row_ids)`.

base          RowStore: the interface of every store
host          HostRows: tables in host memory, in any row encoding
file          FileRows: tables in a file on disk, read row by row
table_file    the format of that file
checksums     of its blocks: written with the rows, compared when they are read
write         writes such a file, streaming
cache         HostCache: frequent rows of a slower store, in host memory
device_cache  DeviceCache: frequent rows of a store, on the accelerator
"""
