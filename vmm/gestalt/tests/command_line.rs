//! The `gestalt` program as its users meet it: what it refuses, how it ends, what becomes of the terminal.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, echo_node, hello};
use crossbeam::channel::{self, Receiver};
use gestalt::doctor::{Needs, check_can_run};
use machine::config::MachineConfig;
use machine::control::FromCoordinator;
use machine::control::join::join;
use machine::control::wire::{self, Answer};
use machine::keys::KeyFile;
use nix::fcntl::{FcntlArg, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

fn gestalt(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gestalt"));
    // Sockets of running machines, of which tests have several of one name.
    let sockets = Path::new(env!("CARGO_TARGET_TMPDIR")).join("machines");
    command.args(arguments).env_remove("GESTALT_LOG").env(gestalt::operator::place::FOLDER, sockets);
    command
}

fn output(arguments: &[&str]) -> Output {
    gestalt(arguments).stdin(Stdio::null()).output().unwrap()
}

/// The one sentence that a refused command line ends with.
fn refusal(arguments: &[&str]) -> String {
    let output = output(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    said
}

/// A file that passes for a kernel when only its form is looked at: an x86-64 ELF with one loadable segment.
fn tiny_kernel(folder: &Path) -> String {
    let mut elf = vec![0u8; 0x1000];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(20, &1u32.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes()); // entry: 16 MiB
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // PT_LOAD
    put(68, &5u32.to_le_bytes());
    put(72, &0x200u64.to_le_bytes());
    put(80, &0x100_0000u64.to_le_bytes());
    put(88, &0x100_0000u64.to_le_bytes());
    put(96, &0x100u64.to_le_bytes());
    put(104, &0x100u64.to_le_bytes());
    let path = folder.join("kernel");
    std::fs::write(&path, elf).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn every_bad_request_ends_with_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let kernel = tiny_kernel(folder.path());
    let text = file("text", "not a kernel");
    let huge = folder.path().join("huge");
    File::create(&huge).unwrap().set_len(2 << 30).unwrap();
    let node = |name: &str| format!("[[node]]\nname = \"{name}\"\ncpus = 1\nmemory = \"256M\"\n");
    let twins = file("twins.toml", &format!("kernel = \"kernel\"\n{}{}", node("a"), node("a")));
    let unknown = file("unknown.toml", &format!("kernel = \"kernel\"\nkolor = 1\n{}", node("a")));
    let empty = file("empty.toml", "kernel = \"kernel\"\n");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "no kernel"),
        (vec!["--kernel", "/no/such/vmlinuz"], "/no/such/vmlinuz"),
        (vec!["--kernel", &text], "neither a bzImage nor an ELF"),
        (vec!["--kernel", &kernel, "--initrd", "/no/such/initrd"], "/no/such/initrd"),
        (vec!["--kernel", &kernel, "--initrd", huge.to_str().unwrap()], "huge"),
        (vec!["--kernel", &kernel, "--cpus", "0"], "no CPU"),
        (vec!["--kernel", &kernel, "--nodes", "0"], "no node"),
        (vec!["--kernel", &kernel, "--memory", "1M"], "1 MiB"),
        (vec!["--kernel", &kernel, "--memory", "268435457"], "multiple of 4096"),
        (vec!["--kernel", &kernel, "--shards", "0"], "0 shards"),
        (vec!["--kernel", &kernel, "--listen", &address], "is in use by another process"),
        (vec!["--kernel", &kernel, "--report", "/no/such/folder/report"], "/no/such/folder/report"),
        (vec!["/no/such/machine.toml"], "/no/such/machine.toml"),
        (vec![&twins], "\"a\""),
        (vec![&unknown], "line 2"),
        (vec![&empty], "no node"),
    ];
    for (arguments, part) in cases {
        let said = refusal(&[&["run"], &arguments[..]].concat());
        assert!(said.starts_with("gestalt: ") && said.contains(part), "{said:?} lacks {part:?}");
    }
}

#[test]
fn flags_that_make_no_sense_are_explained() {
    for (arguments, part) in [
        (vec!["run", "--memory", "lots"], "\"lots\" is not a size"),
        (vec!["run", "--silence", "soon"], "\"soon\" is not a duration"),
        (vec!["run", "--node", "name=a,colour=red"], "no \"colour\""),
        (vec!["run", "machine.toml", "--nodes", "2"], "cannot be used with"),
        (vec!["node", "--name", "n0"], "--join"),
    ] {
        let output = output(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(part), "{said:?} lacks {part:?}");
    }
}

#[test]
fn bash_completes_commands_and_their_flags() {
    let script = output(&["completions", "bash"]);
    assert!(script.status.success());
    let completed = |words: &[&str]| {
        let (before, now) = (words[words.len() - 2], words[words.len() - 1]);
        let ask = format!(
            "source /dev/stdin; COMP_WORDS=({} '{now}'); COMP_CWORD={}; _gestalt gestalt '{now}' {before}; \
             echo \"${{COMPREPLY[@]}}\"",
            words[..words.len() - 1].join(" "),
            words.len() - 1
        );
        let mut bash = Command::new("bash");
        bash.args(["--norc", "-c", &ask]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut bash = bash.spawn().ok()?;
        bash.stdin.take().unwrap().write_all(&script.stdout).unwrap();
        Some(String::from_utf8(bash.wait_with_output().unwrap().stdout).unwrap())
    };
    let Some(commands) = completed(&["gestalt", ""]) else { return println!("skipped: there is no bash") };
    assert!(commands.contains(" run ") && commands.contains(" device "), "{commands}");
    assert!(!commands.contains("disk-search"), "{commands}");
    assert_eq!(completed(&["gestalt", "key", "sh"]).unwrap().trim(), "show");
    assert_eq!(completed(&["gestalt", "run", "--plain"]).unwrap().trim(), "--plaintext-fabric");
}

#[test]
fn the_manual_is_written_or_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("man1");
    assert!(output(&["man", dir.to_str().unwrap()]).status.success());
    assert!(dir.join("gestalt.1").exists() && dir.join("gestalt-device-add.1").exists());
    let file = dir.join("gestalt.1/man1");
    let said = refusal(&["man", file.to_str().unwrap()]);
    assert!(said.contains(file.to_str().unwrap()), "{said}");
}

#[test]
fn completions_that_cannot_be_printed_are_a_failure() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = gestalt(&["completions", "zsh"]).stdout(full).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
}

#[test]
fn a_host_that_cannot_run_a_machine_is_refused_in_the_doctors_words() {
    let doctor = output(&["doctor"]);
    let said = String::from_utf8(doctor.stdout).unwrap();
    let Err(why) = check_can_run(&Needs::default()) else {
        assert_eq!(doctor.status.code(), Some(0), "{said}");
        assert!(!said.contains("FAIL"), "{said}");
        return;
    };
    assert_eq!(doctor.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("FAIL {why}\n")), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let refused = refusal(&["run", "--kernel", &tiny_kernel(folder.path())]);
    assert!(refused.contains(&why), "{refused}");
}

#[test]
fn the_doctor_says_so_when_memory_does_not_suffice() {
    let output = output(&["doctor", "--memory", "1024T"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.lines().any(|line| line.starts_with("FAIL 1073741824 MiB of guest memory")), "{said}");
}

#[test]
fn a_node_without_a_coordinator_gives_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let folder = tempfile::tempdir().unwrap();
    let key = &key_file(folder.path());
    let said =
        refusal(&["node", "--join", &address, "--name", "n0", "--key", key, "--join-timeout", "500ms"]);
    assert!(said.contains(&format!("no coordinator was reached at {address}")), "{said}");
    let said =
        refusal(&["node", "--join", "nonsense", "--name", "n0", "--key", key, "--join-timeout", "500ms"]);
    assert!(said.contains("\"nonsense\" is not an address"), "{said}");
    let said = refusal(&["node", "--join", &address, "--name", "a b", "--key", key]);
    assert!(said.contains("\"a b\" cannot be a node's name"), "{said}");
}

#[test]
fn a_node_tells_a_coordinator_of_another_kind_or_version_apart() {
    let folder = tempfile::tempdir().unwrap();
    for (reply, part) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "does not speak Gestalt's control protocol"),
        (&b"\x19\0\0\0\0install one version, now"[..], "refused this node: install one version, now"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answering = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(reply).unwrap();
            // Until the node has read it and left.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let said = refusal(&["node", "--join", &address, "--name", "n0", "--key", &key_file(folder.path())]);
        std::fs::remove_file(folder.path().join("machine.key")).unwrap();
        assert!(said.contains(part), "{said}");
        answering.join().unwrap();
    }
}

/// The file of the test machines' key.
fn key_file(folder: &Path) -> String {
    let path = folder.join("machine.key");
    KeyFile::Machine(common::machine_key()).write_new(&path).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn keys_are_made_for_their_owner_alone_and_shown_without_their_secret() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (machine, node) = (path("machine.key"), path("n1.key"));
    assert!(output(&["key", "new", &machine]).status.success());
    assert!(output(&["key", "node", &machine, "n1", &node]).status.success());
    let show = |file: &str| String::from_utf8(output(&["key", "show", file]).stdout).unwrap();
    let coordinator = show(&machine).lines().last().unwrap().to_owned();
    assert!(coordinator.starts_with("coordinator ") && show(&node).contains(&coordinator));
    assert!(show(&node).starts_with("key of node n1\n"));
    for file in [&machine, &node] {
        let text = std::fs::read_to_string(file).unwrap();
        let secret = text.split_whitespace().find(|word| word.len() == 64).unwrap();
        assert!(!show(file).contains(secret), "the secret shows");
    }
    assert!(refusal(&["key", "new", &machine]).contains("never overwritten"));
    assert!(refusal(&["key", "node", &node, "n2", &path("n2.key")]).contains("node n1 alone"));
    let said = refusal(&["node", "--join", "127.0.0.1:1", "--name", "n0", "--key", &node]);
    assert!(said.contains("that of node n1"), "{said}");
    std::fs::set_permissions(&machine, std::fs::Permissions::from_mode(0o644)).unwrap();
    let said = refusal(&["key", "show", &machine]);
    assert!(said.contains("chmod 600"), "{said}");
}

/// A `gestalt run` whose nodes are all elsewhere: in threads of this test.
struct Run {
    child: Child,
    _keys: tempfile::TempDir,
    address: String,
    stderr: Receiver<String>,
}

impl Run {
    fn start(nodes: usize, stdin: Stdio, stdout: Stdio, more: &[&str]) -> Run {
        let mut command = gestalt(&["run", "--kernel", "vmlinuz", "--listen", "127.0.0.1:0"]);
        let keys = tempfile::tempdir().unwrap();
        command.args(["--key", &key_file(keys.path())]);
        for index in 0..nodes {
            command.args(["--node", &format!("name=n{index},cpus=1,memory=256M,where=remote")]);
        }
        let mut child =
            command.args(more).stdin(stdin).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
        let (tell, stderr) = channel::unbounded();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let mut run = Run { child, address: String::new(), stderr, _keys: keys };
        let hint = run.line_with("gestalt node --join");
        run.address = hint.split("--join ").nth(1).unwrap().split(' ').next().unwrap().into();
        run
    }

    fn line_with(&self, part: &str) -> String {
        loop {
            let line = self.stderr.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line says {part:?}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

#[test]
fn a_piped_machine_relays_its_console_reports_and_ends_with_its_guest() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let arguments = ["--report", report.to_str().unwrap()];
    let mut run = Run::start(2, Stdio::piped(), Stdio::piped(), &arguments);
    // Typed before any guest is there to read it, and the pipe closed: neither is lost nor harmful.
    run.child.stdin.take().unwrap().write_all(b"echo!").unwrap();
    let nodes: Vec<_> = ["n0", "n1"].map(|name| echo_node(&run.address, name)).into();
    let mut console = String::new();
    run.child.stdout.take().unwrap().read_to_string(&mut console).unwrap();
    assert_eq!(console, "hello\r\necho!");
    assert_eq!(run.code(), Some(0));
    for node in nodes {
        node.join().unwrap().unwrap();
    }
    let report: serde_json::Value = serde_json::from_reader(File::open(report).unwrap()).unwrap();
    assert_eq!(report["remote_read_faults"], 21);
    assert_eq!(report["outcome"], "powered off");
}

#[test]
fn devices_of_a_running_machine_are_shown_added_held_back_and_removed() {
    let mut run = Run::start(2, Stdio::piped(), Stdio::null(), &["--name", "changes", "--balloon"]);
    let nodes: Vec<_> = ["n0", "n1"].map(|name| echo_node(&run.address, name)).into();
    let device = |arguments: &[&str]| output(&[&["device", "--machine", "changes"], arguments].concat());
    let says = |arguments: &[&str], part: &str| {
        let output = device(arguments);
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(said.contains(part), "{arguments:?}: {said:?} does not contain {part:?}");
        output.status.success()
    };
    // The guest does not run before all nodes have said so.
    let begin = Instant::now();
    while !device(&["add", "--disk", "a.img,node=n1,iops=50"]).status.success() {
        assert!(begin.elapsed() < PATIENCE, "the machine does not run");
    }
    assert!(says(&["list"], "disk0"));
    assert!(says(&["list", "--json"], "\"iops\": 50"));
    assert!(says(&["set", "disk0", "iops=none", "bandwidth=1M"], "iops=none bandwidth=1048576"));
    assert!(!says(&["set", "disk0", "iops=0"], "at least 1"));
    assert!(!says(&["set", "disk0", "share=300"], "disk_bandwidth"));
    assert!(!says(&["remove", "disk7"], "there is balloon0, disk0"));
    assert!(says(&["set", "balloon0", "size=64M"], "67108864 bytes"));
    assert!(says(&["list"], "size 64.0 MiB"));
    assert!(!says(&["add", "--net", "tap=refused"], "no such interface"));
    assert!(says(&["remove", "disk0"], "disk0 is gone"));
    let other = output(&["device", "--machine", "other", "list"]);
    assert!(String::from_utf8(other.stderr).unwrap().contains("no machine called other"));
    run.child.stdin.take().unwrap().write_all(b"!").unwrap();
    assert_eq!(run.code(), Some(0));
    for node in nodes {
        node.join().unwrap().unwrap();
    }
    assert!(!says(&["list"], "no machine called changes"));
}

#[test]
fn signals_end_the_machine_and_show_in_the_exit_code() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut run = Run::start(1, Stdio::null(), Stdio::null(), &[]);
        run.signal(signal);
        assert_eq!(run.code(), Some(128 + signal as i32));
    }
}

#[test]
fn a_lost_node_ends_the_run_with_an_error_within_five_seconds() {
    let mut run = Run::start(2, Stdio::null(), Stdio::null(), &[]);
    let node = echo_node(&run.address, "n0");
    let lost = TcpStream::connect(&run.address).unwrap();
    let key = common::machine_key().node("n1").unwrap();
    let (Answer::Assigned(_), _) = wire::introduce(&lost, &key, &hello("n1")).unwrap() else {
        panic!("refused")
    };
    let begin = Instant::now();
    // Dropped, it would be reset if a heartbeat has come that nobody has read.
    lost.shutdown(Shutdown::Write).unwrap();
    let said = run.line_with("gestalt: ");
    assert_eq!(said, "gestalt: node n1 was lost: it closed the connection");
    assert_eq!(run.code(), Some(1));
    assert!(begin.elapsed() < Duration::from_secs(5));
    node.join().unwrap().unwrap_err();
}

impl Drop for Run {
    fn drop(&mut self) {
        // A failed test leaves nothing behind; fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_operator_whose_terminal_takes_nothing_stops_no_guest_and_can_still_end_the_machine() {
    let silence = MachineConfig::default().silence;
    let (screen, stderr) = std::io::pipe().unwrap();
    fcntl(&screen, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let keys = tempfile::tempdir().unwrap();
    let child = gestalt(&["run", "--kernel", "vmlinuz", "--listen", "127.0.0.1:0"])
        .args(["--key", &key_file(keys.path())])
        .args(["--node", "name=n0,cpus=1,memory=256M,where=remote"])
        .args(["--node", "name=n1,cpus=1,memory=256M,where=remote"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let mut run = Run { child, address: String::new(), stderr: channel::never(), _keys: keys };
    let mut lines = BufReader::new(&screen).lines();
    let hint = lines.find_map(|line| line.ok().filter(|line| line.contains("--join"))).unwrap();
    let address = hint.split("--join ").nth(1).unwrap().split(' ').next().unwrap();
    let (_assignment, control) = join(&common::options(address, "n0")).unwrap();
    // From here on nobody reads. Strangers and those who come twice are told of in the operator's terminal.
    for _ in 0..50 {
        TcpStream::connect(address).unwrap().write_all(&[9; 5]).unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let key = common::machine_key().node("n0").unwrap();
        let answer = wire::introduce(&stream, &key, &hello("n0"));
        assert!(matches!(answer, Ok((Answer::Refused { .. }, _))), "{:?}", answer.map(|(answer, _)| answer));
    }
    let (tell, told) = channel::unbounded();
    let fence = control.fence().clone();
    thread::spawn(move || {
        // What was heard before this began does not last so long.
        let end = Instant::now() + 2 * silence;
        while Instant::now() < end {
            fence.pass().unwrap();
        }
        tell.send(()).unwrap();
    });
    told.recv_timeout(PATIENCE).expect("the node may not write to its disks any more");
    run.signal(Signal::SIGTERM);
    assert!(matches!(control.recv_timeout(PATIENCE), Ok(Some(FromCoordinator::Stop(_)))));
    drop(control);
    assert_eq!(run.code(), Some(128 + 15));
}

/// A terminal whose one end is the machine's standard input and output.
struct Terminal {
    keyboard: File,
    seen: Receiver<Vec<u8>>,
    slave: OwnedFd,
}

impl Terminal {
    fn new() -> Terminal {
        let pty = openpty(None, None).unwrap();
        let mut screen = File::from(pty.master.try_clone().unwrap());
        let (tell, seen) = channel::unbounded();
        thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(length @ 1..) = screen.read(&mut piece) {
                if tell.send(piece[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { keyboard: pty.master.into(), seen, slave: pty.slave }
    }

    fn stdio(&self) -> Stdio {
        self.slave.try_clone().unwrap().into()
    }

    fn raw(&self) -> bool {
        let flags = tcgetattr(&self.slave).unwrap().local_flags;
        !flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn expect(&self, text: &str) {
        let mut all = Vec::new();
        while !String::from_utf8_lossy(&all).contains(text) {
            let piece = self.seen.recv_timeout(PATIENCE);
            all.extend(piece.unwrap_or_else(|_| panic!("{:?}", String::from_utf8_lossy(&all))));
        }
    }
}

#[test]
fn the_terminal_is_raw_for_the_guest_and_put_back_when_the_operator_leaves() {
    let mut terminal = Terminal::new();
    let mut run = Run::start(1, terminal.stdio(), terminal.stdio(), &[]);
    assert!(!terminal.raw(), "Ctrl-C must work while nodes are waited for");
    let node = echo_node(&run.address, "n0");
    run.line_with("Ctrl-] then q");
    assert!(terminal.raw());
    terminal.keyboard.write_all(b"a\x03b\x1d\x1dc").unwrap();
    terminal.expect("a\x03b\x1dc");
    terminal.keyboard.write_all(b"\x1dq").unwrap();
    assert_eq!(run.code(), Some(0));
    assert!(!terminal.raw());
    node.join().unwrap().unwrap();
}

#[test]
fn the_terminal_is_put_back_when_a_node_is_lost_or_a_signal_comes() {
    for lose in [true, false] {
        let terminal = Terminal::new();
        let mut run = Run::start(2, terminal.stdio(), terminal.stdio(), &[]);
        let node = echo_node(&run.address, "n0");
        let options = common::options(&run.address, "n1");
        let (_assignment, control) = machine::control::join::join(&options).unwrap();
        common::prepare(&control).unwrap();
        run.line_with("Ctrl-] then q");
        assert!(terminal.raw());
        if lose {
            drop(control);
            assert_eq!(run.code(), Some(1));
        } else {
            run.signal(Signal::SIGTERM);
            assert!(matches!(control.recv_timeout(PATIENCE), Ok(Some(FromCoordinator::Stop(_)))));
            drop(control);
            assert_eq!(run.code(), Some(128 + 15));
        }
        assert!(!terminal.raw());
        node.join().unwrap().unwrap();
    }
}
