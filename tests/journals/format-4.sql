PRAGMA application_id=1717986409;
PRAGMA user_version=4;
BEGIN TRANSACTION;
CREATE TABLE claims(node_id TEXT PRIMARY KEY, words TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "claims" VALUES('660e8400-e29b-41d4-a716-446655440001','["word-1", "word-2"]');
CREATE TABLE heartbeat(id INTEGER PRIMARY KEY CHECK(id = 1), at REAL);
INSERT INTO "heartbeat" VALUES(1,1800001000.0);
CREATE TABLE jobs(seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
    scenario TEXT NOT NULL, node_id TEXT, spec TEXT NOT NULL, state TEXT NOT NULL, ended REAL);
INSERT INTO "jobs" VALUES(1,'550e8400-e29b-41d4-a716-446655440000','completed','720p30-h264','660e8400-e29b-41d4-a716-446655440001','{"scenario": "720p30-h264", "confidence": "auto", "parameters": {}, "settings": {"scenario": "720p30-h264", "codec": "h264", "container": "matroska", "input": null, "output": null, "duration": 10, "bitrate": null, "crf": null, "encoder": null, "preset": null, "width": 1280, "height": 720, "fps": 30, "pixel_format": null, "audio": true, "gop": null, "two_pass": false, "realtime": false, "hwaccel": null, "threads": null, "max_memory_mb": null, "max_cpu_percent": null, "quality": [], "settle": 0.0, "cooldown": 0.0, "timeout": null, "overwrite": false}}','[1800001000.0, 3, "completed", "660e8400-e29b-41d4-a716-446655440001", 1, null, 0, null, null, 1800001005.0, 1800001014.0, null, null, null, [{"attempt": 1, "node_id": "660e8400-e29b-41d4-a716-446655440001", "started_at": 1800001005.0, "ended_at": 1800001014.0, "status": "completed", "error": null, "failure_reason": null}], [[1800001000.0, "pending", null], [1800001005.0, "running", null], [1800001014.0, "completed", null]], [], 1, null, false, [], []]',1800001014.0);
INSERT INTO "jobs" VALUES(2,'550e8400-e29b-41d4-a716-446655440001','running','720p30-h264','660e8400-e29b-41d4-a716-446655440001','{"scenario": "720p30-h264", "confidence": "auto", "parameters": {}, "settings": {"scenario": "720p30-h264", "codec": "h264", "container": "matroska", "input": null, "output": null, "duration": 10, "bitrate": null, "crf": null, "encoder": null, "preset": null, "width": 1280, "height": 720, "fps": 30, "pixel_format": null, "audio": true, "gop": null, "two_pass": false, "realtime": false, "hwaccel": null, "threads": null, "max_memory_mb": null, "max_cpu_percent": null, "quality": [], "settle": 0.0, "cooldown": 0.0, "timeout": null, "overwrite": false}}','[1800001000.0, 3, "running", "660e8400-e29b-41d4-a716-446655440001", 1, "word-2", 0, null, null, 1800001014.0, null, null, null, null, [{"attempt": 1, "node_id": "660e8400-e29b-41d4-a716-446655440001", "started_at": 1800001014.0, "ended_at": null, "status": "running", "error": null}], [[1800001000.0, "pending", null], [1800001014.0, "running", null]], [], null, null, false, [], []]',NULL);
INSERT INTO "jobs" VALUES(3,'550e8400-e29b-41d4-a716-446655440002','pending','720p30-h264',NULL,'{"scenario": "720p30-h264", "confidence": "auto", "parameters": {}, "settings": {"scenario": "720p30-h264", "codec": "h264", "container": "matroska", "input": null, "output": null, "duration": 10, "bitrate": null, "crf": null, "encoder": null, "preset": null, "width": 1280, "height": 720, "fps": 30, "pixel_format": null, "audio": true, "gop": null, "two_pass": false, "realtime": false, "hwaccel": null, "threads": null, "max_memory_mb": null, "max_cpu_percent": null, "quality": [], "settle": 0.0, "cooldown": 0.0, "timeout": null, "overwrite": false}}','[1800001000.0, 3, "pending", null, 0, null, 0, null, null, null, null, null, null, null, [], [[1800001000.0, "pending", null]], [], null, null, false, [], []]',NULL);
INSERT INTO "jobs" VALUES(4,'550e8400-e29b-41d4-a716-446655440003','paused','720p30-h264',NULL,'{"scenario": "720p30-h264", "confidence": "auto", "parameters": {}, "settings": {"scenario": "720p30-h264", "codec": "h264", "container": "matroska", "input": null, "output": null, "duration": 10, "bitrate": null, "crf": null, "encoder": null, "preset": null, "width": 1280, "height": 720, "fps": 30, "pixel_format": null, "audio": true, "gop": null, "two_pass": false, "realtime": false, "hwaccel": null, "threads": null, "max_memory_mb": null, "max_cpu_percent": null, "quality": [], "settle": 0.0, "cooldown": 0.0, "timeout": null, "overwrite": false}}','[1800001000.0, 3, "paused", null, 0, null, 0, null, null, null, null, null, null, null, [], [[1800001000.0, "pending", null], [1800001014.0, "paused", "pause was asked for"]], [], null, null, false, [], []]',NULL);
CREATE TABLE logs(job_seq INTEGER NOT NULL, attempt INTEGER NOT NULL, first INTEGER NOT NULL,
    count INTEGER NOT NULL, lines TEXT NOT NULL,
    PRIMARY KEY(job_seq, attempt, first)) WITHOUT ROWID;
INSERT INTO "logs" VALUES(1,1,0,1,'["one"]');
INSERT INTO "logs" VALUES(1,1,1,1,'["two"]');
CREATE TABLE nodes(id TEXT PRIMARY KEY, record TEXT NOT NULL);
INSERT INTO "nodes" VALUES('660e8400-e29b-41d4-a716-446655440001','{"anonymous": false, "drain_until": null, "draining": false, "facts": "{\"address\": \"worker\", \"cpu_threads\": 8, \"ram_total_bytes\": 17179869184, \"cpu_model\": \"A CPU\", \"ram_bytes\": 17179869184}", "failures": [], "last_heartbeat": 1800001014.0, "leaving": false, "name": "worker", "offline": false, "orders": 0, "past": [], "protocol": 2, "quarantine": null, "registered_at": 1800001000.0, "session_hash": "1e2952b478968fb69e105423445683880726a3929232c26772e629d7ecf762cd", "slots": 1, "trial": null}');
INSERT INTO "nodes" VALUES('660e8400-e29b-41d4-a716-446655440002','{"anonymous": false, "drain_until": null, "draining": false, "facts": "{\"address\": \"idle\", \"cpu_threads\": 4, \"ram_total_bytes\": 8589934592, \"ram_bytes\": 8589934592}", "failures": [], "last_heartbeat": 1800001000.0, "leaving": false, "name": "idle", "offline": false, "orders": 0, "past": [], "protocol": 2, "quarantine": null, "registered_at": 1800001000.0, "session_hash": "d885d2d3c4365bc4253b2cceaa7c026002772cb51d24ae08189c2ce613e90143", "slots": 1, "trial": null}');
CREATE TABLE owners(node_id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL);
INSERT INTO "owners" VALUES('660e8400-e29b-41d4-a716-446655440001','984ca5162200734c592148f1820b71057f098573d138666b48663e4e30cd8d3a');
INSERT INTO "owners" VALUES('660e8400-e29b-41d4-a716-446655440002','2a38ea589ea53942aaadc5460a48cf8e43f1092108d181a371451050758aaf51');
CREATE TABLE results(seq INTEGER PRIMARY KEY, status TEXT NOT NULL, scenario TEXT NOT NULL,
    node_id TEXT NOT NULL, body TEXT NOT NULL, job_seq INTEGER);
INSERT INTO "results" VALUES(1,'completed','720p30-h264','660e8400-e29b-41d4-a716-446655440001','{"job_id": "550e8400-e29b-41d4-a716-446655440000", "node_id": "660e8400-e29b-41d4-a716-446655440001", "attempt": 1, "status": "completed", "metrics": {"duration": 9.0}, "node": "worker", "scenario": "720p30-h264", "received_at": "2027-01-15T08:16:54.000Z"}',1);
CREATE TABLE totals(kind TEXT, status TEXT, scenario TEXT, node_id TEXT, count INTEGER NOT NULL,
    PRIMARY KEY(kind, status, scenario, node_id)) WITHOUT ROWID;
INSERT INTO "totals" VALUES('jobs','completed','720p30-h264','660e8400-e29b-41d4-a716-446655440001',1);
INSERT INTO "totals" VALUES('jobs','paused','720p30-h264','',1);
INSERT INTO "totals" VALUES('jobs','pending','720p30-h264','',1);
INSERT INTO "totals" VALUES('jobs','running','720p30-h264','660e8400-e29b-41d4-a716-446655440001',1);
INSERT INTO "totals" VALUES('results','completed','720p30-h264','660e8400-e29b-41d4-a716-446655440001',1);
CREATE INDEX jobs_by_status ON jobs(status, seq);
CREATE INDEX jobs_by_node ON jobs(node_id, seq) WHERE node_id IS NOT NULL;
CREATE INDEX jobs_by_end ON jobs(ended) WHERE ended IS NOT NULL;
CREATE INDEX results_by_job ON results(job_seq);
COMMIT;
