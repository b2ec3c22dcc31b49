// Who uses a node: what is mounted from it, also where the file system has a device number of its own.
import Glibc
import Testing

@testable import LinuxIO

@Suite struct NodeUsersTests {
    /// A block node of this machine, with its number.
    private static let node: (path: String, major: UInt32, minor: UInt32)? = {
        for name in (try? DiskInventory().disks().map(\.node)) ?? [] {
            var status = stat()
            guard stat(name, &status) == 0, status.st_mode & S_IFMT == S_IFBLK else { continue }
            return (name, UInt32(status.st_rdev >> 8 & 0xFFF), UInt32(status.st_rdev & 0xFF))
        }
        return nil
    }()

    @Test func `a mounted disk is used at its directory`() {
        var users = NodeUsers()
        users.add(mount: "29 1 8:17 / /srv rw,relatime shared:1 - ext4 /dev/sdb1 rw")
        users.add(mount: "30 1 8:18")
        users.add(mount: "31 1 x:y / /tmp rw - tmpfs tmpfs rw")
        #expect(users.purposes(major: 8, minor: 17).last == "/srv")
    }

    @Test(.enabled(if: node != nil)) func `a file system over several disks uses the one that it names`() throws {
        let node = try #require(Self.node)
        var users = NodeUsers()
        users.add(mount: "32 1 0:45 /@ /backup rw,relatime shared:9 - btrfs \(node.path) rw,subvol=/@"[...])
        #expect(users.purposes(major: node.major, minor: node.minor).last == "/backup")
        let before = users
        users.add(mount: "33 1 0:46 / /run rw - tmpfs tmpfs rw")
        users.add(mount: "34 1 0:47 / /x rw shared:1 - btrfs")
        #expect(users == before)
    }
}
