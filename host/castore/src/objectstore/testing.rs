//! Object stores for tests, one of them a server.

use std::{
    any::Any,
    env, fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
};

use tempfile::TempDir;

const SERVER: &str = "s3s-fs";
const BUCKET: &str = "bucket";

/// Addresses of empty object stores of all kinds that can be had without an account, with what must outlive their use.
/// Those of the kind `memory` are different stores each time that they are opened.
pub(crate) fn addresses() -> Vec<(String, Box<dyn Any>)> {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("objectstore+file://{}/some%20where", dir.path().display());
    let server = S3Server::start();
    let s3 = server.address("some/where");
    vec![("objectstore+memory:///".to_owned(), Box::new(())), (file, Box::new(dir)), (s3, Box::new(server))]
}

/// A process that serves S3 from a directory. It ends with the value.
pub(crate) struct S3Server {
    process: Child,
    endpoint: String,
    _dir: TempDir,
}

impl S3Server {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let mut process = Command::new(program())
            .args(["--host", "127.0.0.1", "--port", "0", "--access-key", "key", "--secret-key", "secret"])
            .arg(dir.path())
            .env("RUST_LOG", "s3s_fs=info")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        let endpoint = lines.find_map(|line| Some(line.split_once("server is running at ")?.1.to_owned())).unwrap();
        // Reads the rest of its log, so that it never blocks on the pipe.
        thread::spawn(move || lines.count());
        Self { process, endpoint, _dir: dir }
    }

    pub(crate) fn address(&self, path: &str) -> String {
        let options = "region=none&allow_http=true&aws_access_key_id=key&aws_secret_access_key=secret";
        format!("objectstore+s3://{BUCKET}/{path}?endpoint={}&{options}", self.endpoint)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(env::var_os("HOME").unwrap()).join(".cache"));
    let path = cache.join("cofferdam/tools/bin").join(SERVER);
    assert!(path.is_file(), "{} is missing; run: images/setup.sh test", path.display());
    path
}
