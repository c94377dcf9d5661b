"""Operations on image files that no guest uses: create, inspect, check, resize, copy, commit and rebase."""
