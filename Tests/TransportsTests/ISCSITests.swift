// Logical units of an iSCSI target (tgtd) as disks: their bytes, their holes, who they are, and targets that fail.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

/// A file with data and holes of several lengths, none of them at the borders of 4 KiB.
private func makeThinFile(_ directory: TemporaryDirectory, _ name: String = "lun") throws -> String {
    let path = try directory.makeSparseFile(name, size: 24 << 20)
    let file = try Descriptor.open(path, O_RDWR)
    for (offset, count) in [(0, 300_000), (2 << 20, 4096), (5 << 20, 3 << 20), ((24 << 20) - 8192, 8192)] {
        try patternBytes(count, seed: UInt64(offset) + 1).withUnsafeBytes {
            try writeFully(file.number, $0, at: UInt64(offset), flags: 0)
        }
    }
    return path
}

/// A listening socket that lets whoever comes connect, and says nothing.
private func silentPort() throws -> (socket: ListeningSocket, port: UInt16) {
    guard let socket = try ListeningSocket.listen(on: .tcp(host: "127.0.0.1", port: 0)).first,
        case .tcp(_, let port) = socket.address
    else { throw CheckFailure("no socket") }
    return (socket, port)
}

@Suite struct ISCSITests {
    @Test(arguments: ["512", "4096"])
    func unitConforms(sector: String) throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let content = patternBytes(3 << 19, seed: 4)
            let path = try directory.makeFile("lun", content)
            try target.add(path, serial: "A", "--thin", "--sector", sector)
            try DeviceConformance { ConformanceSubject(try target.open(), content: content) }.run()
            try requireEqual(try contentOfFile(path), content, "a unit that was only read")
        }
    }

    @Test func thinUnitHasTheHolesOfItsFile() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let path = try makeThinFile(directory)
            try target.add(path, "--thin")
            try target.add(path, serial: "THICK")
            let file = try RawFileDevice.open(path)
            let thin = try target.open()
            let whole = 0..<thin.info.size
            let parts: [Range<UInt64>] = [whole, 1_000_001..<7_000_003, 511..<513, (24 << 20) - 1..<24 << 20]
            for range in parts {
                let expected = try statusExtents(file, range)
                #expect(try statusExtents(thin, range) == expected, "\(range)")
            }
            #expect(try statusExtents(file, whole).count > 4)
            // A unit that is not thin is data from end to end.
            let thick = try target.open(2)
            #expect(try statusExtents(thick, whole) == [StatusRun(length: 24 << 20, value: AllocationFlags.data)])
            try requireEqual(
                try readBytes(thin, at: 0, count: 24 << 20), try contentOfFile(path), "the unit and its file")
        }
    }

    @Test func unitTellsWhoItIs() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            try target.add(try makeThinFile(directory), serial: "SERIAL42", "--thin")
            let device = try target.open(1, "header-digest=crc32c&initiator=iqn.2026-01.lab.example:me")
            let facts = Dictionary(uniqueKeysWithValues: device.info.identity.map { ($0.key, $0.value) })
            #expect(facts["serial"] == "SERIAL42" && facts["vendor"] == "LABSAN" && facts["thin"] == "yes")
            #expect(facts["wwn"]?.hasPrefix("naa.6") == true && facts["block"] == "512")
            #expect(device.info.isReadOnly && device.info.name == target.uri())
            try requireError(.readOnly, "writing") {
                try device.flush(); try device.discard(0..<512, durable: false)
            }
        }
    }

    @Test func passwordsComeFromFiles() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory, chap: "backup:a-long-secret")
            try target.add(try makeThinFile(directory))
            let good = directory.file("iscsi/password")
            let query = "password-file=\(good)&timeout=5"
            let device = try SourceReference(target.uri(user: "backup", query)).open()
            #expect(device.info.size == 24 << 20)
            let wrong = try directory.makeFile("wrong", Array("another-secret\n".utf8))
            try requireError(.denied, "a wrong password") {
                _ = try SourceReference(target.uri(user: "backup", "password-file=\(wrong)&timeout=5")).open()
            }
            try requireError(.denied, "another user") {
                _ = try SourceReference(target.uri(user: "other", query)).open()
            }
            try requireError(.denied, "nobody") { _ = try target.open(1, "timeout=5") }
            chmod(good, 0o644)
            try requireError(.denied, "a password that everybody can read") {
                _ = try SourceReference(target.uri(user: "backup", query)).open()
            }
        }
    }

    @Test func whatIsNotThereIsSaid() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            try target.add(try makeThinFile(directory))
            try requireError(.notFound, "no such unit") { _ = try target.open(7) }
            try requireError(.unsupported, "unit 0 is the target's controller") { _ = try target.open(0) }
            let other = target.uri().replacing(ISCSITarget.name, with: "iqn.2026-01.lab.example:none")
            try requireError(.notFound, "no such target") { _ = try SourceReference(other).open() }
            try requireError(.readOnly, "writing") { _ = try target.open(writable: true) }
            do { _ = try target.open(writable: true) } catch {
                #expect("\(error)".contains("--overlay") && "\(error)".contains("kernel"), "\(error)")
            }
            let refused = "iscsi://127.0.0.1:1/\(ISCSITarget.name)/1"
            try requireError(.inputOutput, "nobody listens") { _ = try SourceReference(refused).open() }
            do { _ = try SourceReference(refused).open() } catch { #expect("\(error)".contains("refused"), "\(error)") }
        }
    }

    @Test func silentTargetIsLeft() throws {
        let (socket, port) = try silentPort()
        let begin = monotonicSeconds()
        try requireError(.inputOutput, "nothing is said") {
            _ = try SourceReference("iscsi://127.0.0.1:\(port)/\(ISCSITarget.name)/1?timeout=1").open()
        }
        #expect(monotonicSeconds() - begin < 60)
        withExtendedLifetime(socket) {}
    }

    @Test func referencesAreTakenApart() throws {
        let reference = try SourceReference(
            "iscsi://me@[::1]:3261/iqn.2001-04.com.example%3Adisk/300?password-file=/p&timeout=7&reconnect=0&format=raw"
        )
        guard case .iscsi(let unit) = reference.kind else { throw CheckFailure("\(reference.kind)") }
        #expect(unit.host == "::1" && unit.port == 3261 && unit.user == "me" && unit.passwordFile == "/p")
        #expect(unit.target == "iqn.2001-04.com.example:disk" && unit.unit == 300)
        #expect(unit.timeoutSeconds == 7 && unit.reconnectSeconds == 0)
        #expect("\(unit)" == "iscsi://[::1]:3261/iqn.2001-04.com.example:disk/300")
        let name = "iqn.2001-04.com.example:disk"
        for text in [
            "iscsi:host/\(name)/1", "iscsi://host/\(name)", "iscsi://host/\(name)/x", "iscsi://host/\(name)/16384",
            "iscsi://host/\(name)/1/2", "iscsi:///\(name)/1", "iscsi://host:0/\(name)/1", "iscsi://host:x/\(name)/1",
            "iscsi://host/disk/1", "iscsi://::1/\(name)/1", "iscsi://-h/\(name)/1", "iscsi://host/\(name)/-1",
            "iscsi://me@host/\(name)/1", "iscsi://host/\(name)/1?password-file=p", "iscsi://host/\(name)/1?timeout=0",
            "iscsi://host/\(name)/1?target-user=t", "iscsi://host/\(name)/1?header-digest=md5",
            "iscsi://host/\(name)/1?initiator=me", "iscsi://host/\(name)/1?tls=yes", "iscsi://host/\(name)/",
        ] {
            try requireError(.invalid, text) { _ = try SourceReference(text) }
        }
        for text in [
            "iscsi://me%25secret@host/\(name)/1", "iscsi://me%secret@host/\(name)/1", "iscsi://me:secret@h/\(name)/1",
        ] {
            do {
                _ = try SourceReference(text)
                throw CheckFailure("\(text) is taken")
            } catch let error as BlockError {
                #expect(error.kind == .denied && !error.message.contains("secret"), "\(error)")
            }
        }
    }
}

/// A run of a status, to be compared.
private struct StatusRun: Equatable {
    var length: UInt64
    var value: UInt32
}

private func statusExtents(_ device: any BlockDevice, _ range: Range<UInt64>) throws -> [StatusRun] {
    var list = StatusList(capacity: 4096)
    let end = try device.status(.allocation, of: range, into: &list)
    try require(end == range.upperBound, "the status ends at \(end)")
    return list.extents.map { StatusRun(length: $0.length, value: $0.value) }
}
