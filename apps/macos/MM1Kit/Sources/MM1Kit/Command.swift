#if os(macOS) || os(Linux)
    import Foundation

    extension MM1Server {
        /// A program and the arguments before `serve`.
        public struct Command: Sendable, Hashable {
            public var executable: URL
            public var arguments: [String]

            /// - Parameters:
            ///   - executable: `mm1`, or a Python.
            ///   - arguments: none for `mm1`; `["-m", "mm1_mlx.apps"]` for a Python.
            public init(_ executable: URL, arguments: [String] = []) {
                self.executable = executable
                self.arguments = arguments
            }

            /// The first of these that there is: `$MM1_EXECUTABLE`; `mm1` among the app's
            /// executables; a Python in its resources, `python/bin/python3`; `mm1` on `$PATH`,
            /// and where pip, pipx, uv and Homebrew put it, which an app's `$PATH` leaves out.
            ///
            /// - Throws: ``MM1ServerError/notFound(_:)``.
            public static func find(
                environment: [String: String] = ProcessInfo.processInfo.environment
            ) throws(MM1ServerError) -> Command {
                try find(environment: environment, bundle: .main)
            }

            static func find(
                environment: [String: String], bundle: Bundle
            ) throws(MM1ServerError) -> Command {
                if let named = environment["MM1_EXECUTABLE"] {
                    // Named by somebody: nothing else will do.
                    let command = Command(URL(fileURLWithPath: named))
                    guard command.isThere else { throw MM1ServerError.notFound([named]) }
                    return command
                }
                let candidates = inside(bundle) + installed(environment)
                guard let found = candidates.first(where: \.isThere) else {
                    throw MM1ServerError.notFound(candidates.map(\.executable.path))
                }
                return found
            }

            func isInside(_ bundle: Bundle) -> Bool {
                executable.standardizedFileURL.path
                    .hasPrefix(bundle.bundleURL.standardizedFileURL.path + "/")
            }

            private var isThere: Bool {
                var isFolder: ObjCBool = false
                let path = executable.path
                return FileManager.default.fileExists(atPath: path, isDirectory: &isFolder)
                    && !isFolder.boolValue && FileManager.default.isExecutableFile(atPath: path)
            }

            private static func inside(_ bundle: Bundle) -> [Command] {
                var commands: [Command] = []
                if let own = bundle.url(forAuxiliaryExecutable: "mm1") {
                    commands.append(Command(own))
                }
                if let resources = bundle.resourceURL {
                    // A console script names its Python by a path that ends with the build.
                    let python = resources.appendingPathComponent("python/bin/python3")
                    commands.append(Command(python, arguments: ["-m", "mm1_mlx.apps"]))
                }
                return commands
            }

            /// `bin` of every version of Python that has a folder there, the newest first.
            private static func versions(in folder: String) -> [String] {
                let names = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
                return names.sorted { $0.compare($1, options: .numeric) == .orderedDescending }
                    .map { "\(folder)/\($0)/bin" }
            }

            private static func installed(_ environment: [String: String]) -> [Command] {
                var folders = (environment["PATH"] ?? "").split(separator: ":").map(String.init)
                if let home = environment["HOME"] {
                    folders.append(home + "/.local/bin")
                    // Of `pip install --user`.
                    folders += versions(in: home + "/Library/Python")
                }
                folders += ["/opt/homebrew/bin", "/usr/local/bin"]
                // Of python.org.
                folders += versions(in: "/Library/Frameworks/Python.framework/Versions")
                // An empty or relative one would be the folder somebody stands in.
                return folders.filter { $0.hasPrefix("/") }
                    .map { Command(URL(fileURLWithPath: $0).appendingPathComponent("mm1")) }
            }
        }
    }
#endif
