"""Turn sources of any kind into rows: tables and folders, headings, splits, and a folder replaced in one step."""
