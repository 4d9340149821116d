"""Tests, laid out like grafter/. Real programs: e2e/. Of the whole tree: project/. What tests share: parts/."""
