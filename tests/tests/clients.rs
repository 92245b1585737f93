//! The command line as a daemon's client: the store that it uses, and its errors if no daemon answers.

use std::{os::unix::net::UnixListener, path::Path};

use cofferdam_tests::{Cofferdam, Daemon, castore::node_of};
use nix::unistd::geteuid;

#[test]
fn the_advised_import_makes_a_build_with_a_daemon_succeed() {
    let [server, user] = [Cofferdam::new(), Cofferdam::new()];
    let daemon = Daemon::start(&server, "");
    let addr = daemon.addr();
    let variables = [("COFFERDAM_DAEMON", Path::new(&addr))];
    let input = user.file("input", "from the client\n");
    let text = node_of(&input).to_string();
    let digest = text.split(':').nth(1).unwrap();
    let run = || {
        let build = user.build().without_slot().host_variable("COFFERDAM_DAEMON", &addr).output("build/out").exported();
        build.flag("--input", format!("in={digest}"))
    };
    let refused = run().shell("cp /inputs/in out").is_refused("command_line");
    let advice = refused.stderr.split("try: import it with `").nth(1).and_then(|rest| rest.split('`').next());
    let advised: Vec<_> = advice.expect("it advises an import").split(' ').skip(1).collect();
    let advised = advised.iter().map(|word| if *word == "PATH" { input.to_str().unwrap() } else { word });
    user.command(advised).succeeds();
    assert_eq!(run().shell("cp /inputs/in out").succeeds().read("build/out"), "from the client\n");

    // On a terminal it prints the id at once, and the duration after a failure.
    let failed = user.build().on(&daemon).on_terminal((24, 120)).start_shell("exit 3").end().build_fails("exit_code");
    let id = failed.build_id().expect("it is told");
    failed.says(&format!("build {id}")).says("failed after ").says("(boot ");

    // The variable alone is enough, too, and nothing goes into the client's own store.
    let there = |arguments: &[&str]| user.command_with(&variables, arguments);
    let other = user.file("other", "more\n");
    let imported = there(&["import", "--json", other.to_str().unwrap()]).succeeds().json();
    let node = imported["node"].as_str().unwrap();
    assert_eq!(there(&["store", "cat", node]).succeeds().stdout, "more\n");
    let dest = user.files().join("exported");
    let exported = there(&["export", "--json", node, dest.to_str().unwrap()]).succeeds().json();
    assert_eq!((exported["node"].as_str(), std::fs::read_to_string(&dest).unwrap().as_str()), (Some(node), "more\n"));
    user.command(["store", "cat", node]).exits_with(2);
    for command in [&["gc"][..], &["verify"], &["root", "list"]] {
        let refused = there(&[&["store"], command].concat());
        refused.exits_with(2).says("can't be reached by its files").says("run this on the daemon's host");
    }
    daemon.end().succeeds();
}

#[test]
fn connection_errors_name_their_cause() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']");
    let list = |addr: &str| cofferdam.command(["builds", "list", "--json", "--daemon", addr]).executor_fails("daemon");
    let plain = daemon.addrs(2).remove(1);
    let encrypted = list(&plain.replace("http", "https"));
    let encrypted = encrypted.says("does not speak TLS").says(&format!("name it as {plain}"));
    assert_eq!(encrypted.json()["fields"]["cause"], "speaks_no_tls");
    list("grpc+http://nowhere.invalid:1").says("has no address");

    let dead = cofferdam.files().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    for path in [&dead, &cofferdam.files().join("absent.sock")] {
        let addr = format!("grpc+unix://{}", path.display());
        list(&addr).says(&format!("nobody listens at {addr}")).says("start it with `cofferdam daemon`");
        let file = cofferdam.file("file", "");
        let import = cofferdam.command(["import", "--json", "--daemon", &addr, file.to_str().unwrap()]);
        assert_eq!(import.executor_fails("daemon").says("nobody listens").json()["fields"]["cause"], "nobody_listens");
    }
    if geteuid().is_root() {
        // Others may enter the directory, but not use the daemon's socket.
        let addr = daemon.addr();
        let nobody = Cofferdam::unprivileged();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(cofferdam.files().parent().unwrap(), open).unwrap();
        let refused = nobody.command(["builds", "list", "--daemon", &addr]).exits_with(3);
        refused.says("has no permission to connect to the daemon").says("the socket's owner, group and mode");
    }
    daemon.end().succeeds();
}
