"""A page on this machine: compare two recordings, enrol people, and ask who speaks; `memo-jax app`, extra `[app]`.

Read `page` first: it builds and serves it. `answers` turns recordings into what it shows, `people_map` draws where
voices lie.
"""
