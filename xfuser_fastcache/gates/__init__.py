"""Gates: from statistics, may a span be skipped?"""
