use super::*;

#[test]
fn strangers_and_old_clients_are_turned_away() {
    assert_eq!(Server::new().raw(ALICE, &b"GET / HTTP/1.1\r\n\r\n"[..]), b"");
    for (version, shown) in [(0x114_u64, "1.20"), (0x226, "2.38"), (u64::MAX, "72057594037927935.255")] {
        let said = [CLIENT_MAGIC.to_le_bytes(), version.to_le_bytes()].concat();
        let heard = Server::new().raw(ALICE, &*said);
        let mut reader = Reader::new(&heard[16..]);
        assert_eq!(reader.integer().unwrap(), 0x6378_7470);
        let text = reader.text("the message").unwrap();
        assert_eq!(text, format!("the protocol's version must be 1.21 or newer, not {shown}"));
    }
}

#[test]
fn unknown_operations_get_an_error_and_the_end() {
    for number in [0, 2, 6, 21, 47, u64::MAX] {
        let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
            said.integer(number)?;
            query_valid(said, &[])
        });
        assert_eq!(heard.error(), format!("operation {number} of Nix's protocol is not supported here"));
        heard.end();
    }
}

#[test]
fn a_set_of_a_billion_strings_gets_an_error_and_the_end() {
    let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
        ask(said, Operation::QueryValidPaths)?;
        said.integer(1_000_000_000_u64)
    });
    assert!(heard.error().starts_with("the paths would take the message beyond 33554432 bytes"));
    heard.end();
}

#[test]
fn a_string_and_a_frame_of_a_terabyte_take_no_memory() {
    let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
        ask(said, Operation::QueryPathInfo)?;
        said.integer(1_u64 << 40)
    });
    assert!(heard.error().starts_with("the path would take the message beyond 33554432 bytes"));
    heard.end();
    // The client goes before it has sent it.
    let server = Server::new();
    let heard = server.talk(ALICE, Version::minor(34), |said| {
        ask(said, Operation::AddMultipleToStore)?;
        said.integer(false)?;
        said.integer(true)?;
        said.integer(1_u64 << 40)?;
        said.integer(1_u64)
    });
    heard.end();
}

#[test]
fn a_conversation_that_is_cut_anywhere_registers_nothing_that_is_not_whole() {
    let tree = tree("target");
    let mut said = Writer(Vec::new());
    hello(&mut said, Version::minor(38)).unwrap();
    add_multiple(&mut said, true, &[&tree]).unwrap();
    let whole = said.0.len();
    for end in 0..=whole {
        let server = Server::new();
        server.raw(ALICE, &said.0[..end]);
        let known = server.nix.paths.get(&ALICE, &server.nix.views.of(""), &tree.path).unwrap();
        // All that may be missing is the end of the frames.
        assert!(known.is_none() || end >= whole - 8, "{end} of {whole}");
    }
}

#[test]
fn a_full_disk_takes_nothing_and_says_so() {
    let (server, tree) = (Server::with_room(false), tree("target"));
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add_multiple(said, true, &[&tree])?;
        query_valid(said, &[&tree.path])
    });
    assert_eq!(heard.error(), format!("path '{}' can't be taken: the disk is full for user:1", tree.path));
    assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new());
    heard.end();
}
