use cofferdam_nix::protocol::{SERVE_CLIENT_MAGIC, SERVE_SERVER_MAGIC};

use super::*;

/// What a client of the serve protocol gets after the hello, and the log.
fn talk(server: &Server, client: Client, minor: u64, say: impl FnOnce(&mut Said) -> io::Result<()>) -> (Heard, String) {
    let mut said = Writer(Vec::new());
    said.integer(SERVE_CLIENT_MAGIC).and_then(|()| said.integer(0x200 | minor)).and_then(|()| say(&mut said)).unwrap();
    let (mut output, mut log) = (Vec::new(), Vec::new());
    let tenant = Tenant::new(client, Arc::clone(&server.nix));
    let builds = Refusing(Arc::clone(&server.requests));
    Serve::new(tenant, builds, &*said.0, &mut output, &mut log).run();
    let mut reader = Reader::new(io::Cursor::new(output));
    assert_eq!([reader.integer().unwrap(), reader.integer().unwrap()], [SERVE_SERVER_MAGIC, 0x207]);
    (Heard(reader), String::from_utf8(log).unwrap())
}

fn add(said: &mut Said, tree: &Tree) -> io::Result<()> {
    said.integer(9_u64)?;
    said.text(&tree.path)?;
    tree.info.write(said)?;
    said.0.extend(&tree.nar);
    Ok(())
}

fn valid(said: &mut Said, paths: &[&StorePath]) -> io::Result<()> {
    said.integer(1_u64)?;
    said.integer(true)?;
    said.integer(false)?;
    said.texts(paths)
}

#[test]
fn a_path_comes_back_as_it_was_given_and_only_to_its_client() {
    let (server, tree) = (Server::new(), tree("target"));
    let ask = |said: &mut Said| {
        valid(said, &[&tree.path])?;
        said.integer(2_u64)?;
        said.texts([&tree.path])?;
        said.integer(7_u64)?;
        said.integer(false)?;
        said.texts([&tree.path])?;
        said.integer(3_u64)?;
        said.text(&tree.path)
    };
    let (mut heard, log) = talk(&server, ALICE, 7, |said| {
        add(said, &tree)?;
        ask(said)
    });
    assert_eq!(log, "");
    assert_eq!(heard.integer(), 1);
    assert_eq!(heard.0.paths("it").unwrap(), BTreeSet::from([tree.path.clone()]));
    assert_eq!(heard.0.path("it").unwrap(), tree.path);
    assert_eq!(heard.0.text("the deriver").unwrap(), "");
    assert_eq!(heard.0.paths("the references").unwrap(), BTreeSet::new());
    assert_eq!([heard.integer(), heard.integer()], [tree.info.nar_size; 2]);
    assert_eq!(heard.0.text("the hash").unwrap(), format!("sha256:{}", tree.info.nar_hash.base32()));
    let address = tree.info.content_address.as_ref().unwrap().to_string();
    assert_eq!(heard.0.text("the content address").unwrap(), address);
    assert_eq!(heard.0.texts("the signatures").unwrap(), [""; 0]);
    assert_eq!(heard.0.text("the end").unwrap(), "");
    assert_eq!(heard.0.paths("the closure").unwrap(), BTreeSet::from([tree.path.clone()]));
    let mut nar = vec![0; tree.nar.len()];
    heard.0.input().read_exact(&mut nar).unwrap();
    assert_eq!(nar, tree.nar);
    heard.end();

    let (mut heard, log) = talk(&server, BOB, 7, ask);
    assert_eq!(heard.0.paths("none").unwrap(), BTreeSet::new());
    assert_eq!(heard.0.text("the end").unwrap(), "");
    assert_eq!(heard.0.paths("none").unwrap(), BTreeSet::new());
    assert_eq!(log, format!("error: path '{}' is not valid\n", tree.path));
    heard.end();
}

#[test]
fn a_build_has_the_settings_of_its_version() {
    for (minor, settings) in [(1, 2), (2, 3), (3, 5), (7, 6)] {
        let server = Server::new();
        let (mut heard, log) = talk(&server, ALICE, minor, |said| {
            said.integer(8_u64)?;
            said.text("/nix/store/wmj2r79gfpngnphqib663hbn0lwfm628-second.drv")?;
            said.integer(1_u64)?;
            for text in ["out", "/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second", "", ""] {
                said.text(text)?;
            }
            said.texts([""; 0])?;
            said.text("x86_64-linux")?;
            said.text("/bin/sh")?;
            said.texts(["-c", "true"])?;
            said.integer(0_u64)?;
            for _ in 0..settings {
                said.integer(0_u64)?;
            }
            valid(said, &[])
        });
        assert_eq!((heard.integer(), log), (6, String::new()));
        assert!(heard.0.text("the message").unwrap().ends_with("too many builds wait\ntry again later"));
        let times = if minor >= 3 { 4 } else { 0 };
        let outputs = u64::from(minor >= 6);
        for _ in 0..times + outputs {
            heard.integer();
        }
        assert_eq!(heard.0.paths("none").unwrap(), BTreeSet::new());
        heard.end();
        assert_eq!(server.requests.lock().len(), 1);
    }
}

#[test]
fn errors_are_in_the_log_and_end_the_conversation() {
    let tree = tree("target");
    let mut other = Tree { info: tree.info.clone(), ..super::tree("target") };
    other.info.nar_hash = Hash::of(b"");
    let (heard, log) = talk(&Server::new(), ALICE, 7, |said| {
        add(said, &other)?;
        valid(said, &[])
    });
    assert!(log.starts_with("error: hash mismatch importing path"), "{log}");
    heard.end();
    let (heard, log) = talk(&Server::new(), ALICE, 7, |said| said.integer(4_u64));
    assert_eq!(log, "error: command 4 of Nix's serve protocol is not supported here\n");
    heard.end();
    let (heard, log) = talk(&Server::new(), ALICE, 0x100, |_| Ok(()));
    assert_eq!(log, "error: the serve protocol's version must be 2, not 3\n");
    heard.end();
}
