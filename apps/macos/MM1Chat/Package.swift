// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "MM1Chat",
    platforms: [.macOS(.v14)],
    dependencies: [.package(path: "../MM1Kit")],
    targets: [.executableTarget(name: "MM1Chat", dependencies: ["MM1Kit"])]
)
