// Exit statuses: 2 for how it was called, 1 for what went wrong, with a reason on standard error and nothing else.
import Testing

@Suite struct UsageTests {
    @Test(arguments: [
        ["serve"], ["serve", "--bogus", "x"], ["serve", "--writable", "--overlay", "x"],
        ["serve", "x", "--name", "a", "--name", "b"],
        ["serve", "--stdio", "--listen", "unix:/x", "x"], ["serve", "--tls", "require", "x"],
        ["serve", "--tls", "maybe", "x"],
        ["serve", "--max-connections", "0", "x"], ["serve", "--handshake-timeout", "0", "x"],
        ["serve", "--size", "many", "x"],
        ["setup", "--check", "--remove"], ["nonsense"], ["cat"], ["cat", "a", "b"], ["map", "--json=1", "x"],
        ["exports"], ["clients", "disconnect"],
    ])
    func `wrong usage is 2`(_ arguments: [String]) throws {
        let outcome = try Tool.diskgate.run(arguments)
        #expect(outcome.status == 2 && outcome.output.isEmpty && !outcome.errors.isEmpty)
    }

    @Test(arguments: [
        ["serve", "/nonexistent/disk"], ["info", "/nonexistent/disk"], ["cat", "/tmp"],
        ["serve", "--listen", "udp:x", "pattern:1M"],
        ["serve", "--allow", "everybody", "pattern:1M"], ["serve", "--fault", "smoke", "pattern:1M"],
        ["serve", "--writable", "pattern:1M"], ["info", "pattern:1X"], ["info", "gopher:x"],
        ["exports", "--control", "unix:/none"],
        ["serve", "--listen", "unix:/nonexistent/socket", "pattern:1M"], ["serve", "a=b", "pattern:1M"],
    ])
    func `what cannot be done is 1`(_ arguments: [String]) throws {
        let outcome = try Tool.diskgate.run(arguments)
        #expect(outcome.status == 1 && outcome.output.isEmpty)
        #expect(outcome.errors.hasPrefix("diskgate: ") && outcome.errors.split(separator: "\n").count == 1)
    }

    @Test(arguments: [["--help"], ["--version"], ["serve", "--help"], ["help", "map"], []])
    func `help is no failure`(_ arguments: [String]) throws {
        let outcome = try Tool.diskgate.run(arguments)
        #expect(outcome.status == 0 && !outcome.output.isEmpty && outcome.errors.isEmpty)
    }
}
