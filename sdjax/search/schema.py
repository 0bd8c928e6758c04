"""The tables of a run's database, version 2.

A *candidate* is anything that is scored: "seed", "expert_1", "method:ties(density=0.4)",
"program:<identity>", "control:scale(...)". A *setting* is what a candidate is applied to: the seed
model, the model bound to each slot, the tensors in scope, the task. An ordinary search has one
setting, "main"; a transfer, an order swap, or a later iteration with another seed is a setting of
its own, so nothing here assumes that a run has one seed.
"""

VERSION = 2

SCHEMA = """
CREATE TABLE run (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  config TEXT NOT NULL,              -- JSON of the whole RunConfig
  fingerprint TEXT NOT NULL,         -- of that JSON: a resumed run must have the same
  versions TEXT NOT NULL,            -- JSON, package -> version
  layers TEXT NOT NULL,              -- JSON, the sandbox layers that are active
  started_at TEXT NOT NULL,
  finished_at TEXT
) STRICT;

CREATE TABLE setting (
  name TEXT PRIMARY KEY,
  seed TEXT NOT NULL,                -- path of the model, or the candidate that became it
  slots TEXT NOT NULL,               -- JSON, slot -> model
  scope TEXT NOT NULL,
  task TEXT NOT NULL
) STRICT;

CREATE TABLE checkpoint (
  name TEXT PRIMARY KEY,
  iteration INTEGER NOT NULL,        -- trained on this iteration's pairs
  role TEXT NOT NULL,
  path TEXT NOT NULL,
  detail TEXT NOT NULL,              -- JSON: steps, losses, fingerprint of the adapter
  saved_at TEXT NOT NULL
) STRICT;

CREATE TABLE lineage (
  iteration INTEGER PRIMARY KEY,
  setting TEXT NOT NULL REFERENCES setting(name),
  generator TEXT NOT NULL,           -- model the generator's base comes from
  checkpoint TEXT REFERENCES checkpoint(name),  -- NULL: the base itself
  temperature REAL NOT NULL
) STRICT;

CREATE TABLE phase (
  iteration INTEGER NOT NULL,
  name TEXT NOT NULL,
  seconds REAL NOT NULL,
  finished_at TEXT NOT NULL,
  PRIMARY KEY (iteration, name)
) STRICT;

CREATE TABLE prompt (
  hash TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  text TEXT NOT NULL
) STRICT;

CREATE TABLE program (
  identity TEXT PRIMARY KEY,
  source TEXT NOT NULL,              -- the first text with this identity
  fingerprint TEXT,                  -- of its outputs on the probe tensors; NULL: not probed
  in_training INTEGER,               -- did the generator's training hold it? NULL: unknown
  families TEXT,                     -- JSON list of operation families; NULL: unknown
  held_out TEXT                      -- JSON list, those of them held out of the training programs
) STRICT;

CREATE TABLE verdict (
  source_hash TEXT PRIMARY KEY,
  source TEXT NOT NULL,
  verdict TEXT NOT NULL,
  rule TEXT NOT NULL,
  message TEXT NOT NULL,
  identity TEXT,
  structure TEXT,
  fingerprint TEXT,
  form TEXT,
  requests TEXT NOT NULL,            -- JSON list
  wire TEXT,                         -- the verified program; rebuilt without running its source
  notes TEXT NOT NULL,               -- JSON list
  cost INTEGER,
  memory INTEGER,
  layers TEXT NOT NULL               -- JSON list, the sandbox layers it was judged under
) STRICT;
CREATE INDEX verdict_identity ON verdict(identity);

CREATE TABLE sample (
  purpose TEXT NOT NULL,             -- "search", or the name of a measurement
  iteration INTEGER NOT NULL,
  number INTEGER NOT NULL,
  prompt TEXT NOT NULL REFERENCES prompt(hash),
  text TEXT NOT NULL,
  tokens BLOB NOT NULL,              -- int32, little-endian, what was sampled
  stopped INTEGER NOT NULL,          -- ended by itself, not cut off
  source_hash TEXT,                  -- NULL: no program in the text
  PRIMARY KEY (purpose, iteration, number)
) STRICT;
CREATE INDEX sample_source ON sample(source_hash);

CREATE TABLE candidate (
  name TEXT PRIMARY KEY,
  kind TEXT NOT NULL CHECK (kind IN ('seed', 'expert', 'method', 'program', 'control')),
  identity TEXT REFERENCES program(identity),
  detail TEXT NOT NULL               -- JSON: method, hyperparameters, grid, ...
) STRICT;

CREATE TABLE application (
  candidate TEXT NOT NULL REFERENCES candidate(name),
  setting TEXT NOT NULL REFERENCES setting(name),
  verdict TEXT NOT NULL,             -- "admitted", or why the weights refuse it after all
  rule TEXT NOT NULL,
  message TEXT NOT NULL,
  change REAL NOT NULL,              -- norm of the merged task vector / mean norm of the experts'
  seconds REAL NOT NULL,
  PRIMARY KEY (candidate, setting)
) STRICT;

CREATE TABLE evaluation (
  id INTEGER PRIMARY KEY,
  candidate TEXT NOT NULL REFERENCES candidate(name),
  setting TEXT NOT NULL REFERENCES setting(name),
  split TEXT NOT NULL,
  complete INTEGER NOT NULL,
  UNIQUE (candidate, setting, split)
) STRICT;

CREATE TABLE score (
  evaluation INTEGER NOT NULL REFERENCES evaluation(id),
  problem TEXT NOT NULL,
  strict INTEGER NOT NULL,
  flexible INTEGER NOT NULL,
  output TEXT NOT NULL,
  PRIMARY KEY (evaluation, problem)
) STRICT, WITHOUT ROWID;

CREATE TABLE pair (
  iteration INTEGER NOT NULL,
  number INTEGER NOT NULL,
  winner TEXT NOT NULL REFERENCES program(identity),
  winner_iteration INTEGER NOT NULL,
  winner_prompt TEXT NOT NULL REFERENCES prompt(hash),
  winner_text TEXT NOT NULL,
  winner_score REAL NOT NULL,
  loser TEXT NOT NULL REFERENCES program(identity),
  loser_iteration INTEGER NOT NULL,
  loser_prompt TEXT NOT NULL REFERENCES prompt(hash),
  loser_text TEXT NOT NULL,
  loser_score REAL NOT NULL,
  PRIMARY KEY (iteration, number),
  CHECK (winner <> loser)
) STRICT;
"""
