// Monitors that are none, or that lie, stall and flood: each is an error in time. And URIs that name no machine.
import Block
import CLinux
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@testable import Hypervisors

/// Somebody at a socket who says some bytes to each who connects, answers each line with others, and then is silent.
private final class Stranger: Sendable {
    let path: String
    private let listening: ListeningSocket

    init(_ directory: TemporaryDirectory, greeting: [UInt8], answer: [UInt8], closing: Bool) throws {
        path = directory.file("stranger.sock")
        let listening = try #require(try ListeningSocket.listen(on: .unix(path: path)).first)
        self.listening = listening
        try startThread(name: "stranger") {
            while true {
                let number = dg_accept(listening.descriptor.number)
                if number < 0 { return }
                let client = Descriptor(owning: number)
                Self.say(greeting, client)
                var bytes = [UInt8](repeating: 0, count: 65536)
                while !closing, read(client.number, &bytes, bytes.count) > 0 { Self.say(answer, client) }
            }
        }
    }

    deinit { shutdown(listening.descriptor.number, Int32(SHUT_RDWR)) }

    private static func say(_ bytes: [UInt8], _ client: Descriptor) {
        var done = 0
        while done < bytes.count {
            let sent = bytes.withUnsafeBytes {
                send(client.number, $0.baseAddress?.advanced(by: done), $0.count - done, Int32(MSG_NOSIGNAL))
            }
            if sent <= 0 { return }
            done += sent
        }
    }
}

@Suite struct HostileMonitorTests {
    private static let good = #"{"QMP": {"version": {}, "capabilities": []}}"# + "\n"

    @Test(arguments: [
        ("", "", false), ("", "", true), ("SSH-2.0-OpenSSH\r\n", "", false), ("{}\n", "", false), (good, "", true),
        (good, "", false), (good, "garbage\n", false), (good, "{\"return\": {}, \"id\": 77}\n", false),
        (good, "{\"what\": 1}\n", false), (good, String(repeating: "[", count: 100_000) + "\n", false),
        (good, String(repeating: "x", count: 17 << 20), false), (good, "\u{0}\u{0}\n", false),
        (good, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n", false),
    ])
    func strangerIsAnErrorInTime(greeting: String, answer: String, closing: Bool) throws {
        try withTemporaryDirectory { directory in
            let stranger = try Stranger(
                directory, greeting: Array(greeting.utf8), answer: Array(answer.utf8), closing: closing)
            #expect(throws: BlockError.self) { try QMPClient.connect(to: .unix(path: stranger.path), seconds: 1) }
        }
    }

    @Test func lateAnswerIsNotTakenForTheNextCommands() throws {
        try withTemporaryDirectory { directory in
            let stranger = try Stranger(
                directory, greeting: Array(Self.good.utf8), answer: Array("{\"return\": {}}\n".utf8), closing: false)
            let client = try QMPClient.connect(to: .unix(path: stranger.path), seconds: 5)
            // Two answers to one command: the second would be the next command's.
            #expect(throws: Never.self) { try client.execute("query-status") }
            #expect(throws: BlockError.self) { try client.execute("query-status", seconds: 0) }
            #expect(throws: BlockError.self) { try client.execute("query-status") }
            #expect(!client.isUsable)
        }
    }

    @Test(arguments: [
        "", "vm1", "qmp+unix:", "qmp+unix:q", "qmp+unix:/q?agent=a", "qmp+unix:/q?scratch=s",
        "qmp+tcp:h:1?nbd=localhost:1&scratch=s", "qmp+unix:/q?what=1", "qmp+unix:/q?agent=", "qmp+unix:/q%zz",
        "qmp+tcp:host", "qmp+unix:/q?timeout=0", "qmp+unix:/q?timeout=1.5",
        "qmp+tcp:host:4444", "qmp+tcp:host:4444?nbd=h:1&scratch=/s", "qmp+tcp:h:0?nbd=localhost:1&scratch=/s",
        "qmp+tcp:h:1?nbd=h:1&scratch=/s&tls=on", "vsphere:vc/vm", "scp:vm", "foo:bar", "libvirt:", "libvirt:qemu",
        "libvirt:qemu:///system/", "libvirt:qemu+ssh://host/system/vm1", "libvirt:qemu:///system/-x",
        "libvirt:qemu:///system/vm?nbd=h:1", "libvirt:qemu:///system/vm?tls=1",
    ])
    func wrongURIsAreRefused(text: String) {
        #expect(throws: BlockError.self) { try Hypervisors.open(text) }
    }

    @Test func partsOfURIs() throws {
        let system = try LibvirtPlace("libvirt:qemu:///system/vm1")
        #expect(system.virsh.uri == "qemu:///system" && system.domain == "vm1" && system.isLocal)
        let session = try LibvirtPlace("libvirt:qemu+unix:///session?socket=/a/b/lock/lab")
        #expect(session.virsh.uri == "qemu+unix:///session?socket=/a/b/lock" && session.domain == "lab")
        let both = try LibvirtPlace("libvirt:qemu+unix:///session/lab?socket=/a/b/lock&scratch=/s")
        #expect(both.virsh.uri == "qemu+unix:///session?socket=/a/b/lock" && both.domain == "lab")
        #expect(both.scratch == "/s")
        let remote = try LibvirtPlace("libvirt:qemu+ssh://host/system/vm?nbd=host:1&scratch=/s&tls=yes")
        #expect(remote.virsh.uri == "qemu+ssh://host/system" && !remote.isLocal && remote.hasTLS)
        #expect(try remote.source("vda", socket: "").description == "nbds://host:1/vda")
        let network = try QEMUPlace(MachineURI("qmp+tcp:[::1]:44?nbd=[::1]:45&scratch=/s"))
        #expect(network.monitor == .tcp(host: "::1", port: 44))
        #expect(try network.source("vda", socket: nil).description == "nbd://[::1]:45/vda")
    }

    @Test(arguments: [
        "", "<", "<a", "<a>", "<a></b>", "<a/><b/>", "<a b/>", "<a b=c/>", "<a>&x;</a>", "<a>&#xD800;</a>",
        "<a>&lt</a>",
        "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", String(repeating: "<a>", count: 100_000), "<a><!-- </a>",
    ])
    func brokenXMLIsAnError(text: String) {
        #expect(throws: BlockError.self) { try XMLElement(parsing: text) }
    }

    @Test func machinesAreTheSameWhateverElseTheirURIsSay() {
        let libvirt = "libvirt:qemu+unix:///session?socket=/s"
        for (one, other, areSame) in [
            ("qmp+unix:/q", "qmp+unix:///q?timeout=5&scratch=/s", true), ("qmp+unix:/q", "qmp+unix:/r", false),
            ("\(libvirt)/vm", "\(libvirt)&scratch=/x/vm", true), ("\(libvirt)/vm", "\(libvirt)/other", false),
            ("libvirt:qemu:///system/vm", "libvirt:qemu:///session/vm", false), ("web", "web", true),
            ("web", "qmp+unix:/q", false),
        ] {
            #expect(Hypervisors.areSame(one, other) == areSame, "\(one) \(other)")
        }
    }

    @Test func XMLIsReadAsItIsWritten() throws {
        let text =
            "<?xml version='1.0'?><!-- x --><a b='1 &amp; \"2\"' c=\"&#65;\"> <d>&lt;x&gt;</d><!-- y --><d e=''/>z</a>"
        let root = try XMLElement(parsing: text)
        #expect(root.name == "a" && root.attributes == ["b": "1 & \"2\"", "c": "A"])
        #expect(root.all("d").map(\.text) == ["<x>", ""] && root["d"]?.attributes.isEmpty == true)
        #expect(XMLElement.escaped("<'&\">") == "&lt;&apos;&amp;&quot;&gt;")
    }

    @Test(arguments: [
        "", " ", "{", "[", "[1,]", "{\"a\"}", "{\"a\":}", "{a:1}", "\"", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"",
        "tru", "nul", "+1",
        ".5", "1 2", "--1", "1e", "[1}", "{\"a\":1]", "\"\u{1}\"", "NaN",
    ])
    func brokenJSONIsNone(text: String) {
        #expect(JSONValue(parsing: text.utf8) == nil)
    }

    @Test func JSONIsReadAsItIsWritten() throws {
        let value: JSONValue = [
            "a": [1, -2, "x\n\"\\\u{1F600}é/", true, false], "b": .null, "c": .number(1.5), "d": [:], "e": [],
            "f": .integer(.max),
        ]
        #expect(JSONValue(parsing: value.encoded) == value)
        #expect(JSONValue(parsing: value.pretty) == value)
        #expect(JSONValue(parsing: #" "\u00e9\ud83d\ude00\/\b\f\r\t" "#.utf8) == .text("é\u{1F600}/\u{8}\u{C}\r\t"))
        #expect(JSONValue(parsing: "18446744073709551615".utf8) == .number(18_446_744_073_709_551_616))
        #expect(JSONValue(parsing: [0x22, 0xFF, 0x22]) == nil)
    }
}
