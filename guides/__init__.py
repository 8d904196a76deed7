"""The guides shipped with pvae: one per file, written exactly as a user's own file would be."""

if __name__ == "guides":  # imported from the repository root by mistake
    raise ImportError("import pvae.guides, not guides: two copies would not share classes")
